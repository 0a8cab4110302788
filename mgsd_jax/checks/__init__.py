"""What a value may be: ranges of config fields, fields of JSON files, and the words of an error."""
