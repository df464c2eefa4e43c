"""How close are samples to the data?"""
