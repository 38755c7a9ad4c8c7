"""Tables and verdicts made of rows that are already measured."""
