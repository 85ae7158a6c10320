"""How text is written where nobody says; light, since --help names these."""

NEW_TOKENS = 128
RAW = "raw"  # the template of who wants none
DRAFT_TOKENS = 4  # before each pass of the large model
