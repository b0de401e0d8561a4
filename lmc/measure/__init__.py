"""What is measured of translators, correctors and images, and how it is shown. No Lightning."""
