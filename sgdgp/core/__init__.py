"""What every room needs and none owns: checks, errors, files, seeds, memory."""
