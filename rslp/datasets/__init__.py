"""The way in: files of a user (GeoTIFFs, tables, pixel series) become an rslearn dataset and its dataset config."""
