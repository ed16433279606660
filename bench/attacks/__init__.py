"""Attacks on a running daemon, each a function that goes on until its process is killed (bench/attack.py runs them)."""
