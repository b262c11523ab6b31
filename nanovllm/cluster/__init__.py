"""Engine processes as one: how many, who gets a request, what happens when one dies."""
