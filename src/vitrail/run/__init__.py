"""What surrounds a training: configs, run directories, resume, loggers, and the jobs of the entry points."""
