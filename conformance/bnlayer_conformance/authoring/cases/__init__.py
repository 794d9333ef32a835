"""The cases, one module per group: `PURPOSE` says what the group is for, `CASES` holds them."""
