"""Whom to thank for the data; model cards repeat it."""

CREDITS = {
  'openmoji': (
    'Images: OpenMoji, the open-source emoji and icon project, https://openmoji.org, licence '
    'CC BY-SA 4.0. Captions: names from the `emoji` package and from OpenMoji.'
  ),
}
