"""The graders of the exercises, one module per chapter: ch01 holds exercises 1.1, 1.2 and so on."""
