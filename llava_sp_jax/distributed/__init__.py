"""Several devices and processes: meshes, shardings, barriers and a watchdog."""
