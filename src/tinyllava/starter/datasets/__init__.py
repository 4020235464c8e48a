"""The labelled images of the starter, out of public packages."""
