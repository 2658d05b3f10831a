"""What `alignpro bench` measures, beside what is installed, and what `alignpro profile` records."""
