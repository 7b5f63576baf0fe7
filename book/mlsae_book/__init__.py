"""The book's own package: what its chapters declare and show, and how its inputs are made."""
