"""Training that is split over ranks, written against the Communicator; the model knows no rank."""
