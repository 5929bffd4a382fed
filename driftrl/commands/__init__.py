"""The commands: parse, build, run, report."""
