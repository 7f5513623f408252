"""The one description of a run: fields, files, and the settings that follow from them."""
