"""The starter: one command that downloads, trains and evaluates a small real model and shows the results."""
