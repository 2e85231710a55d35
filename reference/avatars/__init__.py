"""Reference models that draw people: the art's attributes, their captions, and the trainings."""
