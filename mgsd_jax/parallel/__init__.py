"""Placement over devices and processes: mesh axes, sharding rules, chips, processes."""
