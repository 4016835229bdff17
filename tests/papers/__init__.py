"""A package because some topics' tests are called like tests of the library, and pytest tells them apart by it."""
