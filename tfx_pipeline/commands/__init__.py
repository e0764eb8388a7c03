"""The commands of `funnel`, a module for each topic; what is heavy is imported when a command runs."""
