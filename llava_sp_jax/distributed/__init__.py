"""Runs on several devices and processes: meshes, shardings, barriers and a watchdog."""
