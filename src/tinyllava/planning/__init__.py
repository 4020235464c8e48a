"""What a run may be and what it takes, told before anything is downloaded."""
