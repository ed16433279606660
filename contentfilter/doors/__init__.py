"""Intake: the doors through which messages arrive, and what they share (admission, origin, opening messages)."""
