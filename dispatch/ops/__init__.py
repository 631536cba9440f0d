"""One folder an operator: its declaration, how it is served, and one file a kernel."""
