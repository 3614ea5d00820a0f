"""OpenMoji: about 3,700 captioned colour emoji, with a split that asks for generalisation."""
