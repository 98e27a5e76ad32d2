"""From files and hub ids to windows of tokens, with what is trained on decided once."""
