"""Do a teacher and the student mean the same bytes by the same token id?"""
