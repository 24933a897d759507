"""Small models and data that the tests share."""
