"""Hosts as others see them."""
