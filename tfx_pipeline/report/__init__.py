"""The run report: facts collected from artifacts, drawn as one static page."""
