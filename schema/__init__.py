"""The event contract: tables, features and tasks, declared once."""
