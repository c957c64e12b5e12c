"""Mixins over the Trainer's methods, composed once into a subclass of the trainer class that a recipe names."""
