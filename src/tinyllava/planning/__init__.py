"""Check runs and estimate their cost before anything is downloaded."""
