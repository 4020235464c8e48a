"""The modules of the connectors, one file each."""
