"""The starter: a small real model, downloaded, trained, evaluated and shown by one command."""
