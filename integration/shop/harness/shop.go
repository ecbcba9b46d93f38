// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/cohort-project/cohort/integration/shop"
)

// Images of the shop's members, as the project's set-up builds them.
const (
	DataImage  = "docker.io/library/cohort-data:latest"
	ToolsImage = "docker.io/library/cohort-tools:latest"
)

// Port is what the shop listens on, at its group's address.
const Port = "8080"

// Options say how to run a shop.
type Options struct {
	Ctr Ctr
	// Group is the value of the annotation io.cohort.group, and the prefix of
	// the containers' ids.
	Group string
	Net   *Net
	// Pool is the number of connections to each of PostgreSQL and Redis; 0 is 8.
	Pool int
	// Postgres are further options of the server, such as "-c", "fsync=off".
	Postgres []string
	// LogDir is a host folder for the members' output; empty discards it.
	LogDir string
}

// Shop is a running shop. It may be used concurrently.
type Shop struct {
	Options
	// Addr is the shop's host and port.
	Addr string
	// NetNS is the path of the network namespace that clients are in.
	NetNS string
	// Query asks the shop.
	Query *shop.Query
}

// Members returns the shop's containers in the order in which they start.
func (o Options) Members() []Container {
	pool := o.Pool
	if pool == 0 {
		pool = 8
	}
	member := func(name, image string, args []string, env ...string) Container {
		c := Container{
			ID: o.Group + "-" + name, Image: image, Args: args, Env: env,
			Annotations: []string{"io.cohort.group=" + o.Group, "io.cohort.member=" + name},
			NetNS:       o.Net.GroupPath(),
		}
		if o.LogDir != "" {
			c.Log = o.LogDir + "/" + c.ID + ".log"
		}
		return c
	}
	return []Container{
		member("db", DataImage, append([]string{"/usr/local/bin/run-postgres"}, o.Postgres...)),
		member("cache", DataImage, []string{"/usr/local/bin/run-redis"}),
		member("app", ToolsImage, []string{"/bin/shopd"},
			"PG_DSN=postgres://postgres@127.0.0.1:5432/postgres?sslmode=disable",
			"REDIS_ADDR=127.0.0.1:6379",
			"LISTEN=0.0.0.0:"+Port,
			"POOL="+strconv.Itoa(pool)),
	}
}

// StartShop starts the members and returns when the shop is healthy. On an
// error, what was started is removed again.
func StartShop(ctx context.Context, o Options) (_ *Shop, err error) {
	s := &Shop{Options: o, Addr: net.JoinHostPort(o.Net.GroupIP, Port)}
	s.from(o.Net.ClientPath())
	defer func() {
		if err != nil {
			err = fmt.Errorf("starting the shop %s: %w", o.Group, errors.Join(err, s.Destroy(context.WithoutCancel(ctx))))
		}
	}()
	for _, c := range o.Members() {
		if err := o.Ctr.Run(ctx, c); err != nil {
			return nil, err
		}
	}
	return s, s.Query.WaitHealthy(ctx)
}

func (s *Shop) from(netNS string) {
	s.NetNS = netNS
	s.Query = shop.NewQuery(s.Addr, DialIn(netNS))
}

// Destroy kills the shop's processes and deletes its containers and their
// snapshots. It takes at most a minute and may be called again.
func (s *Shop) Destroy(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var errs []error
	for _, c := range s.Members() {
		errs = append(errs, s.Ctr.Remove(ctx, c.ID))
	}
	return errors.Join(errs...)
}

// Restored returns the shop that was restored under the same ids plus suffix,
// when it answers. It is reached from where clients were, if a link leads
// there, else from inside its own network namespace: a pair to the outside has
// an end that no checkpoint of the group contains.
func (s *Shop) Restored(ctx context.Context, suffix string) (*Shop, error) {
	r := &Shop{Options: s.Options, Addr: s.Addr}
	pid, err := s.Ctr.Pid(ctx, s.Group+"-app"+suffix)
	if err != nil {
		return nil, fmt.Errorf("looking for the restored shop: %w", err)
	}
	r.from(fmt.Sprintf("/proc/%d/ns/net", pid))
	// A restored shop listens already: one try tells whether a link leads there.
	outside, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	if c, err := DialIn(s.Net.ClientPath())(outside, "tcp", s.Addr); err == nil {
		_ = c.Close() // it has answered the question
		r.from(s.Net.ClientPath())
	}
	if err := r.Query.WaitHealthy(ctx); err != nil {
		return nil, fmt.Errorf("asking the restored shop: %w", err)
	}
	return r, nil
}
