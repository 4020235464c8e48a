"""What the command line does: a file for each command, each with ``main(arguments) -> exit status``."""
