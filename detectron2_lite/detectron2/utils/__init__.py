"""Helpers that every other package builds on."""
