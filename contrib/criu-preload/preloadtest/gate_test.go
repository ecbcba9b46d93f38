// SPDX-License-Identifier: Apache-2.0

package preloadtest

import (
	"testing"
)

// gated does what CRIU does, and prints what it hears at its gate; a second process answers.
const gated = `
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static long word = 42;

static void step(const char *what)
{
	printf("%s\n", what);
	fflush(stdout);
}

/* doorman prints what is said and answers late, so that what does not wait is printed first. */
static void doorman(int gate)
{
	char c;

	while (read(gate, &c, 1) == 1) {
		if (c == 'h') {
			printf("says %c\n", c);
			fflush(stdout);
			continue;
		}
		usleep(100000);
		printf("says %c\n", c);
		fflush(stdout);
		if (dprintf(gate, "%s", c == 'B' ? "b\n" : "a") < 1)
			break;
	}
}

int main(void)
{
	int gate[2], messages[2], status;
	char byte, number[16];
	pid_t child;

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, gate) || socketpair(AF_UNIX, SOCK_SEQPACKET, 0, messages))
		return 1;
	if (fork() == 0) {
		close(gate[0]);
		doorman(gate[1]);
		return 0;
	}
	close(gate[1]);
	sprintf(number, "%d", gate[0]);
	if (getenv("ASK") && setenv("COHORT_CRIU_GATE", number, 1))
		return 1;
	/* The kernel's features are tried with ptrace before. */
	child = fork();
	if (child == 0) {
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		raise(19);
		return 0;
	}
	if (waitpid(child, &status, 0) != child || send(messages[1], "a", 1, 0) != 1 ||
	    recv(messages[0], NULL, 0, MSG_TRUNC | MSG_PEEK) != 1 || recv(messages[0], &byte, 1, MSG_TRUNC) != 1)
		return 2;
	usleep(100000);
	if (ptrace(PTRACE_POKEDATA, child, &word, 43L))
		return 3;
	step("tried");
	if (send(messages[1], "b", 1, 0) != 1 || recv(messages[0], NULL, 0, MSG_TRUNC | MSG_PEEK) != 1)
		return 4;
	step("told to go on");
	if (alarm(10))
		return 5;
	step("seizes");
	errno = 0;
	if (ptrace(PTRACE_PEEKDATA, child, &word, NULL) != 43 || errno || alarm(0) != 10)
		return 6;
	step("looks");
	if (ptrace(PTRACE_POKEDATA, child, &word, 44L))
		return 7;
	step("touches");
	if (ptrace(PTRACE_POKEDATA, child, &word, -1L) || ptrace(PTRACE_PEEKDATA, child, &word, NULL) != -1 || errno)
		return 8;
	if (ptrace(PTRACE_PEEKDATA, child, 8L, NULL) != -1 || errno != EIO)
		return 9;
	ptrace(PTRACE_KILL, child, NULL, NULL);
	close(gate[0]);
	while (wait(NULL) > 0)
		;
	return 0;
}
`

func TestCRIUWaitsAtTheGateOnlyWhereAskedFor(t *testing.T) {
	library, program := build(t, gated)
	const free = "tried\ntold to go on\nseizes\nlooks\ntouches\n"
	for _, c := range []struct {
		env  []string
		want string
	}{
		{nil, free},
		{[]string{"LD_PRELOAD=" + library}, free},
		{[]string{"ASK=1"}, free},
		{[]string{"LD_PRELOAD=" + library, "ASK=1"}, "says h\ntried\ntold to go on\nsays A\nseizes\nlooks\nsays B\ntouches\n"},
	} {
		if got := runProgram(t, program, c.env); got != c.want {
			t.Errorf("with %q:\n%s", c.env, got)
		}
	}
}
