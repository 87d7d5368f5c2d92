"""Attacks, judges and the table of success rates."""
