"""Shards to something a person can look at: rows in words, and counts."""
