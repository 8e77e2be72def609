"""Images, random views of them, and the loader that brings both to the device."""
