"""What does the autoencoder lose?"""
