"""The version, alone in a file so that the build can read it without importing anything else."""

VERSION = "0.6.0"
