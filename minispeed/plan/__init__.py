"""Choose a layout: what each costs, which are legal, which is fastest, and why the others are not."""
