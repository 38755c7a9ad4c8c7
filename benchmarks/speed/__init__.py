"""Seconds of steps, of the UNet, of the loader and of whole runs, each against its rivals in the same process."""
