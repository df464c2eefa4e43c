"""Evaluation of samples: how close is their distribution to the data distribution?"""
