"""Who is let in: invitations, enrolment, passports, revocations, and the journal of it all."""
