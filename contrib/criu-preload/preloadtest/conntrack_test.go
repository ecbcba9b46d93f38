// SPDX-License-Identifier: Apache-2.0

package preloadtest

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// dumper asks for dumps over netlink as CRIU does (criu/libnetlink.c, do_rtnl_req), and prints for each the
// number of messages and the type of the last one.
const dumper = `
#include <linux/netfilter/nfnetlink.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

static int dump(int protocol, int type)
{
	struct { struct nlmsghdr h; struct nfgenmsg g; } req;
	struct sockaddr_nl to = { .nl_family = AF_NETLINK };
	struct iovec iov = { &req, sizeof(req) };
	struct msghdr msg = { .msg_name = &to, .msg_namelen = sizeof(to), .msg_iov = &iov, .msg_iovlen = 1 };
	static char buf[16384];
	int s = socket(AF_NETLINK, SOCK_RAW, protocol), messages = 0;

	memset(&req, 0, sizeof(req));
	req.h.nlmsg_len = sizeof(req);
	req.h.nlmsg_type = type;
	req.h.nlmsg_flags = NLM_F_DUMP | NLM_F_REQUEST;
	req.h.nlmsg_seq = 24680;
	if (s < 0 || sendmsg(s, &msg, 0) != sizeof(req))
		return perror("sendmsg"), 1;
	for (;;) {
		struct msghdr in = { .msg_name = &to, .msg_namelen = sizeof(to), .msg_iov = &iov, .msg_iovlen = 1 };
		struct nlmsghdr *h = (void *)buf;
		int n;

		iov.iov_base = buf;
		iov.iov_len = sizeof(buf);
		n = recvmsg(s, &in, 0);
		if (n <= 0 || (in.msg_flags & MSG_TRUNC))
			return perror("recvmsg"), 1;
		for (; NLMSG_OK(h, (unsigned)n); h = NLMSG_NEXT(h, n)) {
			if (h->nlmsg_seq != 24680)
				return fprintf(stderr, "sequence %u\n", h->nlmsg_seq), 1;
			if (h->nlmsg_type == NLMSG_DONE || h->nlmsg_type == NLMSG_ERROR) {
				printf("%d messages, end %d, result %d\n", messages, h->nlmsg_type, *(int *)NLMSG_DATA(h));
				return 0;
			}
			messages++;
		}
	}
}

int main(void)
{
	return dump(NETLINK_NETFILTER, NFNL_SUBSYS_CTNETLINK << 8 | 1) || dump(NETLINK_NETFILTER, NFNL_SUBSYS_CTNETLINK_EXP << 8 | 1) ||
	       dump(NETLINK_NETFILTER, NFNL_SUBSYS_CTNETLINK << 8 | 1) || dump(NETLINK_ROUTE, RTM_GETLINK);
}
`

// TestConnectionTrackingIsAnsweredEmptyOnlyWhereAskedFor also shows that other dumps pass.
func TestConnectionTrackingIsAnsweredEmptyOnlyWhereAskedFor(t *testing.T) {
	if os.Getuid() != 0 {
		missing(t, "root")
	}
	library, program := build(t, dumper)
	run := func(env ...string) []string {
		cmd := exec.Command(program)
		cmd.Env = append(os.Environ(), env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", env, err, out)
		}
		return strings.Split(strings.TrimSpace(string(out)), "\n")
	}
	plain := run()
	if got := run("LD_PRELOAD=" + library); strings.Join(got, "\n") != strings.Join(plain, "\n") {
		t.Errorf("the library alone changes answers: %q; without it %q", got, plain)
	}
	asked := run("LD_PRELOAD="+library, "COHORT_CRIU_NO_CONNTRACK=1")
	for _, i := range []int{0, 2} {
		if asked[i] != "0 messages, end 3, result 0" {
			t.Errorf("the table is answered with %q", asked[i])
		}
	}
	if asked[1] != plain[1] || asked[3] != plain[3] || strings.HasPrefix(plain[3], "0 messages") {
		t.Errorf("other dumps changed: %q; without the library %q", asked, plain)
	}
}
