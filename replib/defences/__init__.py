"""Defences as training objectives, one file each, with the values of their papers."""
